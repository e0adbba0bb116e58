"""Export: the torch model as ONNX graphs, quantised graphs, engines and bundles."""
