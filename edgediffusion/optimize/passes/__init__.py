"""Passes over an ONNX graph: one file each, each a function that changes an ``onnx_ir.Model`` in place and says what it did."""
