// predict PACKAGE ROWS COLUMNS SEED < float32 rows, row by row   ->  a line "field: numbers" each
#include "vbdl_package.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: predict PACKAGE ROWS COLUMNS SEED < float32 rows\n";
    return 2;
  }
  try {
    at::Tensor x = at::empty({std::atoll(argv[2]), std::atoll(argv[3])}, at::kFloat);
    const size_t wanted = static_cast<size_t>(x.numel());
    if (std::fread(x.data_ptr<float>(), sizeof(float), wanted, stdin) != wanted) {
      std::cerr << "there are fewer numbers than ROWS x COLUMNS\n";
      return 1;
    }
    const vbdl::Package predict(argv[1]);
    for (const auto& [name, field] : predict({x}, std::atoll(argv[4]))) {
      std::printf("%s:", name.c_str());
      const at::Tensor flat = field.to(at::kDouble).flatten().contiguous();
      for (int64_t i = 0; i < flat.numel(); ++i) std::printf(" %.9g", flat.data_ptr<double>()[i]);
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::cerr << "predict: " << error.what() << "\n";
    return 1;
  }
}
