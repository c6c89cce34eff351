// Empty on purpose: clang's CUDA mode includes this header of cuRAND, which the compiler packages lack.
