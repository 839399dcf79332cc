"""Container formats of tensors: safetensors, PyTorch's zip and pickle, msgpack."""
