"""What a run costs on TPUs, by their compiler and by arithmetic, on any machine."""
