"""Curves of trainings, in TensorBoard, Weights & Biases and MLflow."""
