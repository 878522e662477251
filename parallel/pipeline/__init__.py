"""Pipeline parallelism: schedules, their timelines, and the overlap of forward and backward."""
