"""What is judged and told: the texts of alerts, the cost of judging."""
