"""Algorithms: the protocol, the policy-gradient base, and the shared maths. No named algorithm lives here."""
