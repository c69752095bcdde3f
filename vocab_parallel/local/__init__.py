"""One rank's rows: statistics of their logits and gradients, without a process group."""
