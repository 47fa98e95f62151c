"""Looking into what a student took over from its teacher."""
