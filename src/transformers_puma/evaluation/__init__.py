"""Evaluation: what needs only the language model, and the runner that all evaluations share."""
