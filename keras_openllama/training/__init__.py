"""What `fit` is: train steps, loss, callbacks."""
