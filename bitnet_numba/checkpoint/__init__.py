"""Model folders: safetensors files, the packed checkpoint, Hugging Face folders, and the conversion between them."""
