"""One file per policy. The entry-point group ``kvplug.policies`` names them."""
