"""Files -> conversations -> token ids and labels. Knows no model and no trainer."""
