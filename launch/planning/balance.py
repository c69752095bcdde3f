"""How many layers each stage gets, and how many rows: the slowest is as fast as can be."""


def layer_counts(num_layers: int, num_stages: int, classifier: float) -> list[int]:
    """Spread the layers; the last stage has the classifier besides.

    Args:
        num_layers, num_stages: of the whole pipeline.
        classifier: what the classifier costs on a rank, in layers.

    Raises:
        ValueError: more stages than layers.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"{num_stages} stages need at least as many layers, got {num_layers}: use fewer "
            f"stages (--pipeline) or more --layers"
        )
    if num_stages == 1:
        return [num_layers]
    before = num_stages - 1

    def slowest(last: int) -> tuple[float, int]:
        return max(-(-(num_layers - last) // before), last + classifier), -last

    last = min(range(1, num_layers - before + 1), key=slowest)
    share, remainder = divmod(num_layers - last, before)
    return [share + (stage < remainder) for stage in range(before)] + [last]
