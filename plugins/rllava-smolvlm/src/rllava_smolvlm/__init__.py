"""SmolVLM and Idefics3 for rllava."""
