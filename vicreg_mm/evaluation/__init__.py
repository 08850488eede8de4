"""What an encoder learned, measured on frozen features: pure metrics on tensors, and `report` that puts them in a table."""
