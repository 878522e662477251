"""Pipeline parallelism: a model's layers in stages on several ranks, micro-batches flowing through them."""
