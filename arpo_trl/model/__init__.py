"""Recipe -> SFTConfig, model, adapter, optimizer; memory; merging."""
