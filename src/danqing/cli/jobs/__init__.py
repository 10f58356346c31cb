"""What each command is asked to do: a job, whose fields are the command's flags."""
