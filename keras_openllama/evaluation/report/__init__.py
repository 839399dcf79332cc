"""Tables and bar charts of evaluation results."""
