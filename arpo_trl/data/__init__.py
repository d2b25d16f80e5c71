"""dataset_info.json + files -> input_ids, labels."""
