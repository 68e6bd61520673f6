"""Device code and its host operators, by language. Knows formats and tensors, no modules and no configs."""
