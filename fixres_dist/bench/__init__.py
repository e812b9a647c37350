"""What things cost, measured beside what they are to be compared with."""
