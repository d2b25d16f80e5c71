"""The rare methods, one file each: what it changes of full and LoRA training. chosen.py lists them."""
