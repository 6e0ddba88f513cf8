"""The paper's evaluation: tasks, judges, and figures with their intervals, for any number of models side by side."""
