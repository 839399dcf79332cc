"""Container formats of tensors: safetensors, torch zip and pickle, msgpack."""
