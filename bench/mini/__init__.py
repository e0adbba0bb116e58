"""The miniature Kontext's task: scenes, instructions and an exact score.

``scenes`` draws pictures from descriptions, ``instructions`` writes what to change about them,
``score`` reads a picture back and says whether that, and nothing else, has happened.
"""
