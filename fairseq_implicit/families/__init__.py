"""What a family of encoders is: its options, checked, and the depth that they make. Pure torch; fairseq and others
give the options their own faces."""
