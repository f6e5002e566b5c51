"""Models that need no download: built by hand, at random, or from a package that carries one."""
