"""Files of adapters: ours and PEFT's, in a folder or on the hub."""
