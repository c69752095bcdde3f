"""One rank's rows, without a process group: statistics of their logits, and their gradients."""
