"""From models to a verdict: scores, fits, one comparison engine, and the tables that it fills."""
