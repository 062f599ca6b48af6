"""Other projects' files: the published DiT layout, diffusers' transformer and pipeline, the Hugging Face hub."""
