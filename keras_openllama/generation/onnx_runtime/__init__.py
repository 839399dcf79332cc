"""The decoding step as an ONNX graph, and its export."""
