"""Any image-text-to-text model of transformers for rllava."""
