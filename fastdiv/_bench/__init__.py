"""Speed of the losses on this machine: what ``python -m fastdiv bench`` runs."""
