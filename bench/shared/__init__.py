"""What several figures share: rules in FP64, small trainings on real text, and the comparison of all elements."""
