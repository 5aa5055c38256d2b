"""Engines: who computes gradients and who samples. The protocols, and the local ones."""
