// A package of vbdl from C++: check, pad to whole tiles, run, cut. The same rules as vbdl/export/package.py.
//
// The compiled code looks at nothing: other sizes than it was made for would be read out of bounds. So every call goes
// through here. A package is native code: load only what you know who made.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vbdl {

class Package {
 public:
  using Fields = std::vector<std::pair<std::string, at::Tensor>>;

  // folder: what `vbdl export` wrote.
  explicit Package(const std::string& folder) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      const std::string name = entry.path().filename().string();
      if (name.rfind("tile_", 0) != 0 || entry.path().extension() != ".pt2") continue;
      const int64_t rows = std::stoll(name.substr(5));
      auto loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(entry.path().string());
      const auto about = loader->get_metadata();
      if (std::stoll(about.at("vbdl_rows")) != rows) throw std::runtime_error(name + " is of another tile");
      fields_ = split(about.at("vbdl_fields"), ',');
      inputs_.clear();
      for (const std::string& text : split(about.at("vbdl_inputs"), ';')) inputs_.push_back(parse(text));
      runners_.emplace(rows, std::move(loader));
    }
    if (runners_.empty()) throw std::runtime_error("there is no package of vbdl in " + folder);
  }

  // Fields of the prediction by name, (rows, ...) each, for any number of rows.
  // Throws std::invalid_argument for tensors that the package does not take.
  Fields operator()(std::vector<at::Tensor> x, int64_t seed) const {
    const int64_t rows = check(x);
    auto chosen = runners_.lower_bound(rows);
    if (chosen == runners_.end()) chosen = std::prev(chosen);
    const int64_t tile = chosen->first;
    std::vector<std::vector<at::Tensor>> parts(fields_.size());
    for (int64_t start = 0; start < std::max<int64_t>(rows, 1); start += tile) {
      std::vector<at::Tensor> given = {at::full({}, seed, at::kLong)};
      for (const at::Tensor& t : x) given.push_back(pad(t, start, tile));
      const auto found = chosen->second->run(given);
      for (size_t i = 0; i < parts.size(); ++i) parts[i].push_back(found.at(i));
    }
    Fields made;
    for (size_t i = 0; i < parts.size(); ++i) made.emplace_back(fields_[i], at::cat(parts[i]).narrow(0, 0, rows));
    return made;
  }

 private:
  struct Input {
    at::ScalarType dtype;
    std::vector<int64_t> shape;  // of one row
  };

  static std::vector<std::string> split(const std::string& text, char by) {
    std::vector<std::string> found;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, by);) found.push_back(part);
    return found;
  }

  static Input parse(const std::string& text) {
    static const std::map<std::string, at::ScalarType> dtypes = {
        {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16}, {"I64", at::kLong},
        {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},   {"U8", at::kByte},       {"BOOL", at::kBool}};
    const size_t colon = text.find(':');
    Input input{dtypes.at(text.substr(0, colon)), {}};
    for (const std::string& size : split(text.substr(colon + 1), ',')) input.shape.push_back(std::stoll(size));
    return input;
  }

  int64_t check(const std::vector<at::Tensor>& x) const {
    if (x.size() != inputs_.size())
      throw std::invalid_argument("this package takes " + std::to_string(inputs_.size()) + " tensor(s)");
    for (size_t i = 0; i < x.size(); ++i) {
      const at::Tensor& t = x[i];
      const Input& wanted = inputs_[i];
      if (!t.defined() || !t.device().is_cpu() || t.layout() != at::kStrided)
        throw std::invalid_argument("tensors are dense and on the CPU");
      if (t.scalar_type() != wanted.dtype)
        throw std::invalid_argument(std::string("this package takes ") + at::toString(wanted.dtype) + ", got " +
                                    at::toString(t.scalar_type()));
      std::vector<int64_t> expected = {t.dim() ? t.size(0) : 0};
      expected.insert(expected.end(), wanted.shape.begin(), wanted.shape.end());
      if (t.sizes() != at::IntArrayRef(expected)) {
        std::stringstream said;
        said << "this package takes (rows";
        for (int64_t size : wanted.shape) said << ", " << size;
        said << "), got " << t.sizes();
        throw std::invalid_argument(said.str());
      }
      if (t.size(0) != x[0].size(0)) throw std::invalid_argument("tensors disagree on the number of rows");
      if (at::isFloatingType(t.scalar_type()) && !at::isfinite(t).all().item<bool>())
        throw std::invalid_argument("rows are not finite");
    }
    return x.at(0).size(0);
  }

  // Rows [start, start + tile), the last one repeated where there are fewer; contiguous.
  static at::Tensor pad(const at::Tensor& t, int64_t start, int64_t tile) {
    const int64_t there = std::min(tile, t.size(0) - start);
    if (there == tile) return t.narrow(0, start, tile).contiguous();
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes[0] = tile;
    at::Tensor padded = at::zeros(sizes, t.options());
    if (there > 0) {
      padded.narrow(0, 0, there).copy_(t.narrow(0, start, there));
      padded.narrow(0, there, tile - there).copy_(t.narrow(0, start + there - 1, 1).expand_as(padded.narrow(0, there, tile - there)));
    }
    return padded;
  }

  std::vector<std::string> fields_;
  std::vector<Input> inputs_;
  std::map<int64_t, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> runners_;
};

}  // namespace vbdl
