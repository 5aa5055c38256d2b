"""What a run will need of memory and time, before anything is loaded: from its config and its model's `config.json`."""
