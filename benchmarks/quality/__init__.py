"""What lower precision costs: the demo model's answers against the ground truth and against fp32 (`precisions`)."""
