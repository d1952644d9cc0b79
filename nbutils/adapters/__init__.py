"""What was trained: gather, save, prove, export, merge, GGUF."""
