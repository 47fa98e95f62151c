"""Analysis of what a student has taken over from its teacher."""
