"""SCBench's twelve tasks and exact recall: three sources, one code path, two kinds of score."""
