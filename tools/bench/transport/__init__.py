"""A round of models side by side: contestants that move the same models, and the meters."""
