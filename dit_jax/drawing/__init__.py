"""From a trained model and prompts to pictures.

pipeline   prompts in, pictures out
plan       what one sampler is compiled for, and the function of arrays that it becomes
canvas     the picture that is edited
pictures   the files of what was drawn
"""
