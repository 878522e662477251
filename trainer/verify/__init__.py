"""Whether two ways to train are the same, and where they part; a report says it to people and to machines."""
