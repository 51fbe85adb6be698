"""The network that serves: its layers, its training, and its release as ONNX graphs."""
