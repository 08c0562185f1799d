"""The bundled tiny model: generated videos, and a small Qwen2.5-VL trained to answer about them.

Importing this package imports neither torch nor transformers; `model.load` does.
"""
