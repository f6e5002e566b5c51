"""What a model's heads look at, for policies that treat heads by kind."""
