"""Train steps, their loss, and `fit` on them; `runs` takes the same steps."""
